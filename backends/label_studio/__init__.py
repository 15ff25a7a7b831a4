"""The Label Studio door: an ML backend over HTTP."""
