"""The demo set: real pictures with captions and real photos, built from ordinary packages."""

from ov3fast.data.demo.build import DemoSet, build_demo

__all__ = ["DemoSet", "build_demo"]
