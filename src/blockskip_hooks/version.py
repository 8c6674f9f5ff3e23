"""Version of the package, in one place for packaging, reports and manifests."""

__version__ = "0.1.0"
