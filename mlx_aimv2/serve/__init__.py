"""A page in the browser to search, look, teach and tidy up, and the API under it (extra `serve`)."""
