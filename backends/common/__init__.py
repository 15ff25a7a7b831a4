"""What both platforms share: settings, fetching images, HTTP errors, metrics, request log. No platform words."""
