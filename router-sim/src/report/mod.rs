//! Reports: what a simulation found ([`data`]), for terminals, files and browsers.

pub mod data;
