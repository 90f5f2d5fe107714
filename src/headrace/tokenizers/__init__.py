"""Visual tokenizers: TokenFlow, UniFlow, FlowTok and the VQGAN of LWM, behind one interface."""
