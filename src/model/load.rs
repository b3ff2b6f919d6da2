//! Fills a rank's weights.
