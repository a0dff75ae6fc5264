"""The one place that knows libvirt's domain."""
