"""Flow matching as pure functions over tensors: t=0 is noise and t=1 is data, everywhere."""
