//! The rules of ARCHITECTURE.md that a program can keep: who may depend on whom, and what no crate may hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What each of our crates may depend on of ours, by folder. Everything else is refused.
const LAYERS: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("mesh", &["proto"]),
    ("net", &["proto", "mesh"]),
    ("ztunnel", &["proto", "mesh", "net"]),
    ("waypoint", &["proto", "mesh", "net"]),
    ("controlplane", &["proto", "mesh", "net"]),
    ("cni", &["proto", "mesh", "net"]),
    ("cni/plugin", &[]),
    (
        "cli",
        &[
            "proto",
            "mesh",
            "net",
            "ztunnel",
            "waypoint",
            "controlplane",
            "cni",
        ],
    ),
    ("fuzz", &["proto", "mesh", "net", "ztunnel"]),
    (
        "tests",
        &[
            "proto",
            "mesh",
            "net",
            "ztunnel",
            "waypoint",
            "controlplane",
            "cni",
            "cli",
        ],
    ),
];

/// Crates from outside that a crate of ours must not name: decisions open no sockets, the tunnel knows no Kubernetes.
const NEVER: &[(&str, &[&str])] = &[
    ("proto", &["tokio", "serde", "rustls"]),
    (
        "mesh",
        &[
            "tokio",
            "tonic",
            "h2",
            "rustls",
            "hyper",
            "nix",
            "socket2",
            "rand",
            "kube",
            "k8s-openapi",
        ],
    ),
    ("net", &["kube", "k8s-openapi"]),
    ("ztunnel", &["kube", "k8s-openapi"]),
    ("waypoint", &["kube", "k8s-openapi"]),
    ("cni/plugin", &["tokio", "hyper", "rustls", "kube", "nix"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ stands in the workspace")
        .to_owned()
}

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "cargo {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("cargo writes UTF-8")
}

/// Folder of each member, with the names of what its manifest depends on (renames undone).
fn members() -> BTreeMap<String, BTreeSet<String>> {
    let text = cargo(&["metadata", "--no-deps", "--format-version", "1", "--locked"]);
    let metadata: serde_json::Value = serde_json::from_str(&text).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages is a list");
    packages
        .iter()
        .map(|package| (folder(package), dependencies(package)))
        .collect()
}

fn folder(package: &serde_json::Value) -> String {
    let manifest = Path::new(
        package["manifest_path"]
            .as_str()
            .expect("a package has a manifest"),
    );
    let folder = manifest.parent().expect("a manifest stands in a folder");
    let folder = folder
        .strip_prefix(root())
        .expect("a member stands in the workspace");
    folder.to_string_lossy().into_owned()
}

fn dependencies(package: &serde_json::Value) -> BTreeSet<String> {
    let list = package["dependencies"]
        .as_array()
        .expect("dependencies is a list");
    list.iter()
        .map(|dependency| dependency["name"].as_str().expect("a name").to_owned())
        .collect()
}

#[test]
fn every_crate_depends_only_on_the_layers_below_it() {
    let members = members();
    for (folder, dependencies) in &members {
        let allowed = LAYERS.iter().find(|(name, _)| name == folder);
        let (_, allowed) = allowed
            .unwrap_or_else(|| panic!("{folder}/ has no place in the layers: add it to LAYERS"));
        for ours in dependencies
            .iter()
            .filter_map(|name| name.strip_prefix("leyline-"))
        {
            assert!(
                allowed.contains(&ours),
                "{folder}/ depends on {ours}/, which its layer forbids"
            );
        }
    }
    assert!(
        members.contains_key("mesh") && members.contains_key("net"),
        "the layers were not found: {members:?}"
    );
}

#[test]
fn no_crate_names_an_outside_crate_that_its_layer_forbids() {
    let members = members();
    for (folder, forbidden) in NEVER {
        let Some(dependencies) = members.get(*folder) else {
            continue;
        };
        for name in *forbidden {
            assert!(!dependencies.contains(*name), "{folder}/ depends on {name}");
        }
    }
}

#[test]
fn the_folder_is_named_as_the_crate() {
    for folder in members().keys() {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml"))
            .expect("a member has a manifest");
        assert!(
            manifest.contains(&format!("name = \"leyline-{}\"", folder.replace('/', "-"))),
            "{folder}/ holds another crate"
        );
    }
}

/// The whole tree below `mesh`, not only what its manifest names: a feature of a dependency must not let it in either.
#[test]
fn decisions_link_no_runtime_and_no_tls() {
    let tree = cargo(&[
        "tree",
        "--package",
        "leyline-mesh",
        "--edges",
        "normal",
        "--prefix",
        "none",
        "--locked",
    ]);
    let names: BTreeSet<&str> = tree
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert!(
        names.contains("leyline-mesh"),
        "cargo tree answered something else: {tree}"
    );
    for forbidden in [
        "tokio",
        "tonic",
        "h2",
        "rustls",
        "mio",
        "hyper",
        "aws-lc-rs",
    ] {
        assert!(
            !names.contains(forbidden),
            "mesh links {forbidden}:\n{tree}"
        );
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder)
        .expect("a folder of the tree can be read")
        .flatten()
    {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_stub_and_no_ignored_test_is_left_behind() {
    let mut files = Vec::new();
    for (folder, _) in LAYERS {
        let path = root().join(folder);
        if path.is_dir() {
            sources(&path, &mut files);
        }
    }
    assert!(files.len() > 20, "only {} sources were found", files.len());
    // Written in halves, or this file would find itself.
    let stubs = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("#[ig", "nore"),
    ];
    for file in files {
        let text = fs::read_to_string(&file).expect("a source is UTF-8");
        for stub in stubs {
            assert!(!text.contains(stub), "{} holds {stub}", file.display());
        }
    }
}
