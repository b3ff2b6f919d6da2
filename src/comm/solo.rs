//! The world of one rank.
