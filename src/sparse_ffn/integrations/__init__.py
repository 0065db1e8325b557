"""Thin bridges to other libraries; each file imports its library, so none is imported with the package."""
