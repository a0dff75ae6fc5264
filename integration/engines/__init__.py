"""The three engines, each by itself: what their plans do to real images, bitmaps and jobs."""
