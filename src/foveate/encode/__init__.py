"""The encode wing: networks that turn a picture into features and classes."""
