from helpers.published import load

__all__ = ["load"]
