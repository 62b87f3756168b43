"""`consumer new`: a small service, written from templates into a new folder."""
