//! Which commit a build says it is: from git's files in all the forms they have, and none where there are none.

#[path = "../build/commit.rs"]
mod commit;

use std::fs;
use std::path::Path;

use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

/// The commit found, and the names of the files that decide it.
fn found(root: &Path) -> Option<(String, Vec<String>)> {
    let (commit, files) = commit::find(root)?;
    let name = |file: &std::path::PathBuf| file.file_name().unwrap().to_str().unwrap().to_owned();
    Some((commit, files.iter().map(name).collect()))
}

#[test]
fn the_commit_is_found_wherever_git_keeps_it() {
    let loose = format!("{COMMIT}\n");
    let packed = format!("# pack-refs with: peeled\n{COMMIT} refs/heads/main\n");
    let note = format!("{{\n  \"git\": {{\n    \"sha1\": \"{COMMIT}\"\n  }}\n}}");
    let on_main = (".git/HEAD", "ref: refs/heads/main\n");
    for (what, root, files, deciding) in [
        ("a branch", "", vec![on_main, (".git/refs/heads/main", loose.as_str())], &["HEAD", "main"][..]),
        (
            "a packed branch",
            "",
            vec![on_main, (".git/packed-refs", packed.as_str())],
            &["HEAD", "packed-refs"],
        ),
        ("no branch", "", vec![(".git/HEAD", loose.as_str())], &["HEAD"]),
        (
            "a further work tree",
            "tree",
            vec![
                ("tree/.git", "gitdir: ../main/.git/worktrees/tree\n"),
                ("main/.git/worktrees/tree/HEAD", "ref: refs/heads/side\n"),
                ("main/.git/worktrees/tree/commondir", "../..\n"),
                ("main/.git/refs/heads/side", loose.as_str()),
            ],
            &["HEAD", "side"],
        ),
        ("a package", "", vec![(".cargo_vcs_info.json", note.as_str()), on_main], &[".cargo_vcs_info.json"]),
    ] {
        let folder = folder(&files);
        let deciding = deciding.iter().map(|name| name.to_string()).collect();
        assert_eq!(found(&folder.path().join(root)), Some((COMMIT[..12].to_owned(), deciding)), "{what}");
    }
}

#[test]
fn no_commit_is_made_up() {
    for files in [
        vec![],
        vec![(".git/HEAD", "ref: refs/heads/main\n")],
        vec![(".git/HEAD", "nonsense")],
        vec![(".git", "gitdir: nowhere\n")],
        vec![(".git/HEAD", "ref: refs/heads/main"), (".git/refs/heads/main", "$(touch x)")],
        vec![(".cargo_vcs_info.json", "{}")],
    ] {
        let folder = folder(&files);
        assert_eq!(found(folder.path()), None, "{files:?}");
    }
}
