"""What the service costs in time and memory, measured on the machine that this runs on: `make bench`."""
