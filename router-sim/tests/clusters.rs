//! Every cluster that ships is read, and is called as its file is.

use std::path::Path;

use router_sim::topology::Cluster;

#[test]
fn shipped_clusters_load() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/clusters");
    let mut seen = 0;
    let shipped: Vec<&str> = Cluster::shipped().collect();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let cluster = Cluster::read(&path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(Some(cluster.name.as_str()), path.file_stem().and_then(|name| name.to_str()));
        assert_eq!(Cluster::find(&cluster.name).unwrap(), cluster);
        seen += 1;
    }
    assert_eq!(seen, shipped.len(), "{} and {shipped:?}", folder.display());
    let refused = Cluster::find("h100").unwrap_err().to_string();
    assert!(refused.contains("neither a file nor one of b200-8x8"), "{refused}");
}

#[test]
fn a_bad_description_is_named_by_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.toml");
    assert!(Cluster::read(&path).unwrap_err().to_string().contains("mine.toml"));
    std::fs::write(&path, "name = \"mine\"\nnodes = 1\nwheels = 4\n").unwrap();
    let message = Cluster::read(&path).unwrap_err().to_string();
    assert!(message.contains("mine.toml") && message.contains("wheels"), "{message}");
}
