"""Where the same work runs on services: requests rendered, validated, submitted, followed, their cost told."""
