"""What a request wants: its fields checked, every dialect resolved into one frozen `Ask`."""
