"""The `headrace` command. One typed function a command; heavy imports stay inside the functions."""
