//! A root of our own on disk.
//!
//! Key and certificate are one file, `ca.pem`, made whole or not at all: there is no state with half of it, whatever
//! fails, and two control planes that start at once agree on one root. `root-cert.pem` beside it, for clients, is
//! written from it at every start.
//!
//! Certificates behind the first are trusted besides: a root is replaced by hand with three starts, first with the next one
//! behind it, then with the key and certificate of the next one before it, at last without it.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use mesh::identity::TrustDomain;
use rcgen::KeyPair;
use time::OffsetDateTime;

use super::{
    authority::{Authority, Material, MaterialError},
    pem, root,
};

/// Key, certificate, and what else is trusted.
pub const CA_FILE: &str = "ca.pem";
/// The root, for clients.
pub const ROOT_FILE: &str = "root-cert.pem";

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Making the folder.
    #[error("make the folder {}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Reading a file.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Writing a file; what was there before is untouched.
    #[error("write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// The cause: a full disk, for example.
        source: io::Error,
    },
    /// Others can read the key.
    #[error("{} may be read by others (mode {mode:o}); make it 600 if nobody has", path.display())]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not a key and its certificate.
    #[error("{} does not hold a private key and its certificate", .0.display())]
    Content(PathBuf),
    /// Generating.
    #[error("make a root")]
    Generate(#[source] rcgen::Error),
    /// What is there does not work.
    #[error("use {}", path.display())]
    Material {
        /// Which file.
        path: PathBuf,
        /// The cause.
        source: MaterialError,
    },
}

/// The root in `dir`; made if there is none.
pub fn load_or_create(dir: &Path, trust_domain: &TrustDomain) -> Result<Authority, DiskError> {
    fs::create_dir_all(dir).map_err(|source| DiskError::Folder {
        path: dir.to_owned(),
        source,
    })?;
    let path = dir.join(CA_FILE);
    if !path.try_exists().unwrap_or(true) {
        let made = root::generate(trust_domain, OffsetDateTime::now_utc());
        let text = made.map(|made| format!("{}{}", made.key, made.certificate));
        let text = text.map_err(DiskError::Generate)?;
        match create(&path, 0o600, text.as_bytes(), open_new) {
            Ok(()) => tracing::info!(path = %path.display(), "made a new root"),
            // Another control plane was faster; its root is the mesh's.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(DiskError::Write { path, source }),
        }
    }
    let authority = load(&path)?;
    publish(&dir.join(ROOT_FILE), &authority.roots_pem())?;
    Ok(authority)
}

fn load(path: &Path) -> Result<Authority, DiskError> {
    let read = |source| DiskError::Read {
        path: path.to_owned(),
        source,
    };
    let mode = fs::metadata(path).map_err(read)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(DiskError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    let text = fs::read_to_string(path).map_err(read)?;
    let content = || DiskError::Content(path.to_owned());
    let key = KeyPair::from_pem(&text).map_err(|_| content())?;
    let roots = pem::certificates(text.as_bytes()).map_err(|_| content())?;
    let certificate = roots.first().cloned().ok_or_else(content)?;
    Authority::new(Material {
        key,
        roots,
        chain: Vec::new(),
        certificate,
    })
    .map_err(|source| DiskError::Material {
        path: path.to_owned(),
        source,
    })
}

/// Makes a file that appears whole and on stable storage, or not at all; `AlreadyExists` if there is one.
pub(super) fn create(
    path: &Path,
    mode: u32,
    content: &[u8],
    open: impl FnOnce(&Path, u32) -> io::Result<File>,
) -> io::Result<()> {
    staged(path, mode, content, open, |staged, path| {
        fs::hard_link(staged, path)
    })
}

/// Puts a file in the place of another, or of none: whole and on stable storage, or not at all.
pub(crate) fn replace(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    let rename = |staged: &Path, path: &Path| fs::rename(staged, path);
    staged(path, mode, content, open_new, rename)
}

/// Writes the root for clients, unless it is there already.
fn publish(path: &Path, roots: &str) -> Result<(), DiskError> {
    if fs::read(path).is_ok_and(|known| known == roots.as_bytes()) {
        return Ok(());
    }
    replace(path, 0o644, roots.as_bytes()).map_err(|source| DiskError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Writes beside `path`, then `place`s; leaves nothing behind when that fails.
fn staged(
    path: &Path,
    mode: u32,
    content: &[u8],
    open: impl FnOnce(&Path, u32) -> io::Result<File>,
    place: impl FnOnce(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = dir.join(format!(".{name}.{:016x}", rand::random::<u64>()));
    let write = || {
        let mut file = open(&staged, mode)?;
        file.write_all(content)?;
        // The umask may have taken more away than meant.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        place(&staged, path)?;
        File::open(dir)?.sync_all()
    };
    let result = write();
    // Renamed away where all went well and it was a rename.
    drop(fs::remove_file(&staged));
    result
}

fn open_new(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
}
