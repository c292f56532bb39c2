"""One file per Ray job."""
