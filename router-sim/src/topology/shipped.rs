//! The clusters of configs/clusters by name.

use std::path::Path;

use super::Cluster;
use crate::{Error, Result};

macro_rules! shipped {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../../configs/clusters/", $name, ".toml")))),*]
    };
}

const SHIPPED: [(&str, &str); 7] =
    shipped!["b200-8x8", "cpu-2-sockets", "gb200-nvl72", "h100-4x8", "h100-8", "h200-2x8", "l40s-2x8",];

impl Cluster {
    /// Names of the clusters that come along.
    pub fn shipped() -> impl Iterator<Item = &'static str> {
        SHIPPED.iter().map(|(name, _)| *name)
    }

    /// A cluster that comes along, by name, or else the description at a path.
    ///
    /// # Errors
    /// [`Error::Description`] listing the names when it is neither, otherwise as [`Cluster::read`].
    pub fn find(name_or_path: &str) -> Result<Cluster> {
        if let Some((_, text)) = SHIPPED.iter().find(|(name, _)| *name == name_or_path) {
            return Cluster::from_toml(text);
        }
        let path = Path::new(name_or_path);
        if !path.exists() {
            return Err(Error::Description(format!(
                "cluster {name_or_path:?} is neither a file nor one of {}",
                Cluster::shipped().collect::<Vec<_>>().join(", ")
            )));
        }
        Cluster::read(path)
    }
}
