"""What the kernels cost and how right they are: run by hand, and by CI in small."""
