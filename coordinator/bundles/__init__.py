"""Bundles: building emulators as signed files, keeping them as blobs, and what they disclose."""
