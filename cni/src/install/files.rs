//! Files that others read at any moment: written beside their place, synced, and moved there in one step.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Names of files that are being written. No runtime reads names without a known ending.
const UNFINISHED: &str = ".leyline-unfinished";

/// Makes `path` hold these bytes with this mode; one that does already is not touched, so that nobody who watches it
/// is woken. Answers whether it was written.
///
/// # Errors
/// The system's. The file at `path` is then what it was.
pub(super) fn put(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    if holds(path, bytes, mode) {
        return Ok(false);
    }
    let unfinished = unfinished(path);
    let written = write(&unfinished, bytes, mode).and_then(|()| fs::rename(&unfinished, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&unfinished);
        return Err(error);
    }
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(true)
}

/// Removes what an earlier agent left half-written.
pub(super) fn clean(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(UNFINISHED) {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Absent is as good as removed.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The file's permission bits.
pub(super) fn mode(path: &Path) -> io::Result<u32> {
    Ok(fs::metadata(path)?.permissions().mode() & 0o7777)
}

fn holds(path: &Path, bytes: &[u8], wanted: u32) -> bool {
    fs::read(path).is_ok_and(|held| held == bytes) && mode(path).is_ok_and(|mode| mode == wanted)
}

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(UNFINISHED);
    path.with_file_name(name)
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    // The umask has had its say.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()
}
