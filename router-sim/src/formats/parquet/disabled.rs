//! Stands in for the reader in builds without it.

use std::path::Path;

use super::super::route_lines::RouteLines;
use super::super::{Options, gather::Gathered, in_file};
use crate::Result;

/// Says which feature to build with.
///
/// # Errors
/// [`crate::Error::File`], always.
pub fn open(path: &Path, _options: &Options) -> Result<Gathered<RouteLines>> {
    Err(in_file(
        path,
        "a parquet file, which this build does not read: build with --features parquet".to_owned(),
    ))
}
