//! Ranks that are threads of this process, over any backend.
