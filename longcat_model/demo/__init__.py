"""The demo: one small model that sees, paints, hears and talks, trained on handwritten numbers and spoken digits."""
