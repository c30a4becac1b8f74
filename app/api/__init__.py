"""The wire: requests in, answers out. What they mean is decided below."""
