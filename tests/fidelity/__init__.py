"""The fidelity benchmark: how much of a trained network's accuracy each step of the conversion keeps."""
