"""A service to look at and to test against: a real S3 server on this machine, and models in it."""
