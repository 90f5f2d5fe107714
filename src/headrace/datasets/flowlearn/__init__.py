"""FlowLearn (arXiv 2407.05183): records, Mermaid, the simulated set's generator, loaders, prompts and the scorer."""
