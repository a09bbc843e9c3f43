"""Our models against independent implementations; the only code that imports them."""
