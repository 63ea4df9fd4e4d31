"""The demo set: real pictures with captions and real photos, built from ordinary packages."""
