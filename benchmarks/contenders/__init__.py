"""What is measured: our layers, those of other libraries, and the networks that they are compared with."""
