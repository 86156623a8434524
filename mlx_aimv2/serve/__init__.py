"""A web page to search, explore, teach and tidy up, and the API behind it (extra `serve`)."""
