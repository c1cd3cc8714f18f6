"""Public conformance batteries for plug-ins and data sets."""
