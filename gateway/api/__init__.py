"""The HTTP surface: routes, and the OpenAPI document that declares them."""
