//! Puts the plugin into the node's CNI configuration, and keeps it there.
//!
//! The plugin's file is copied first, then its entry is written behind the cluster's own plugins; both are checked
//! whenever someone changes the folders, and put right at most once a second. Our plugin never speaks to the API
//! server, so unlike Istio's agent this one writes no kubeconfig. An agent that is replaced leaves everything: pods
//! then wait for the next one rather than start outside the mesh.

mod conflist;
mod files;
mod folders;
mod json;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use net::ready::Gate;
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{telemetry::Telemetry, zds_server::chain};
use conflist::PLUGIN;
pub use conflist::{ConflistError, Entry};
use folders::Watch;

/// The configuration that others chain themselves (Multus). Source: `spec/cni.md` 3.
const STANDALONE_FILE: &str = "YYY-istio-cni.conf";
/// The least time between two reinstalls.
const REINSTALL_PAUSE: Duration = Duration::from_secs(1);
/// Everything is looked at this often even if nobody was seen changing it.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// After a failure: a full disk, or no network plugin yet.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// So many reinstalls in a row, each soon after the other, mean that someone else writes the same files.
const FIGHT: u32 = 5;
const FIGHT_WITHIN: Duration = Duration::from_secs(10);

/// What is installed, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The plugin's file in the agent's image (`LEYLINE_CNI_PLUGIN_SOURCE`).
    pub plugin: PathBuf,
    /// The host's folder of plugins, as mounted.
    pub bin_folder: PathBuf,
    /// The host's folder of configurations, as mounted.
    pub config_folder: PathBuf,
    /// The configuration to chain into (`CNI_CONF_NAME`); `None`: the first usable one in the order of names.
    pub config_name: Option<String>,
    /// How.
    pub way: Way,
    /// Files that are ours may be read by their group (`CNI_CONF_GROUP_READ`).
    pub group_may_read: bool,
    /// What the entry says.
    pub entry: Entry,
}

/// How the plugin gets called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// An entry in the cluster's own list.
    Chained,
    /// A list of our own that comes before the cluster's, with its content: `ISTIO_OWNED_CNI_CONFIG`.
    Owned {
        /// Its name, which must sort before the cluster's.
        file: String,
    },
    /// A configuration for others to call: `CHAINED_CNI_PLUGIN=false`.
    Standalone,
}

/// Why the plugin is not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The plugin's file could not be copied.
    #[error("copy the plugin to {}", path.display())]
    Copy {
        /// Where it should be.
        path: PathBuf,
        /// Why; a full disk, for instance.
        source: io::Error,
    },
    /// A configuration could not be read or written.
    #[error("write the CNI configuration {}", path.display())]
    Config {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The cluster's network plugin has not written its own yet, or only files that no runtime could use.
    #[error("no usable CNI configuration in {} yet", folder.display())]
    NoPrimary {
        /// The folder.
        folder: PathBuf,
    },
    /// The named configuration cannot be chained into.
    #[error("chain into {}", path.display())]
    Chain {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConflistError,
    },
    /// A runtime would take the cluster's list and never ours.
    #[error(
        "{primary} sorts before our own {file}: runtimes take the first; set ISTIO_OWNED_CNI_CONF_FILENAME"
    )]
    OwnedSortsLater {
        /// The cluster's.
        primary: String,
        /// Ours.
        file: String,
    },
}

impl InstallError {
    /// The label of Istio's metric.
    fn result(&self) -> &'static str {
        match self {
            InstallError::Copy { .. } => "COPY_BINARIES_FAILURE",
            _ => "CREATE_CNI_CONFIG_FAILURE",
        }
    }
}

/// Makes everything as it should be. Answers whether anything had to be written.
///
/// # Errors
/// [`InstallError`]; what was there before is there still.
pub fn install(settings: &Settings) -> Result<bool, InstallError> {
    files::clean(&settings.bin_folder);
    files::clean(&settings.config_folder);
    let copied = copy_plugin(settings)?;
    let configured = match &settings.way {
        Way::Standalone => {
            let text = conflist::standalone(&settings.entry);
            let path = settings.config_folder.join(STANDALONE_FILE);
            put(&path, &text, settings.own_mode())
        }
        Way::Owned { file } => own(settings, file),
        Way::Chained => chain_in(settings),
    };
    Ok(configured? || copied)
}

/// Takes the entry out of every configuration: pods start outside the mesh from then on. The plugin's file stays, since
/// a runtime may still call it; [`remove_plugin`] ends that.
///
/// # Errors
/// [`InstallError::Config`] of the last file that failed; the others are done.
pub fn remove_entry(settings: &Settings) -> Result<(), InstallError> {
    let mut outcome = Ok(());
    let mut ours = vec![settings.config_folder.join(STANDALONE_FILE)];
    if let Way::Owned { file } = &settings.way {
        ours.push(settings.config_folder.join(file));
    }
    for path in &ours {
        let removed = files::remove(path);
        outcome = outcome.and(removed.map_err(|source| config_error(path, source)));
    }
    for path in candidates(settings) {
        let Some(text) = fs::read_to_string(&path)
            .ok()
            .and_then(|text| conflist::unchain(&text))
        else {
            continue;
        };
        let mode = files::mode(&path).unwrap_or(0o644);
        outcome = outcome.and(put(&path, &text, mode).map(drop));
    }
    outcome
}

/// Removes the plugin's file.
///
/// # Errors
/// [`InstallError::Copy`].
pub fn remove_plugin(settings: &Settings) -> Result<(), InstallError> {
    let path = settings.bin_folder.join(PLUGIN);
    files::remove(&path).map_err(|source| InstallError::Copy { path, source })
}

fn copy_plugin(settings: &Settings) -> Result<bool, InstallError> {
    let path = settings.bin_folder.join(PLUGIN);
    let copied = fs::read(&settings.plugin).and_then(|bytes| files::put(&path, &bytes, 0o755));
    copied.map_err(|source| InstallError::Copy { path, source })
}

fn chain_in(settings: &Settings) -> Result<bool, InstallError> {
    let (path, text) = primary(settings, None)?;
    let chained = chained(settings, &path, &text)?;
    let mode = files::mode(&path).map_err(|source| config_error(&path, source))?;
    let list = path.with_extension("conflist");
    let written = put(&list, &chained, mode)?;
    if list != path {
        // Last: a runtime finds the old one or the new one, never none.
        files::remove(&path).map_err(|source| config_error(&path, source))?;
    }
    Ok(written)
}

fn own(settings: &Settings, file: &str) -> Result<bool, InstallError> {
    let (path, text) = primary(settings, Some(file))?;
    let name = file_name(&path);
    if name.as_str() < file {
        return Err(InstallError::OwnedSortsLater {
            primary: name,
            file: file.to_owned(),
        });
    }
    let text = chained(settings, &path, &text)?;
    put(
        &settings.config_folder.join(file),
        &text,
        settings.own_mode(),
    )
}

fn chained(settings: &Settings, path: &Path, text: &str) -> Result<String, InstallError> {
    conflist::chain(text, &settings.entry).map_err(|source| InstallError::Chain {
        path: path.to_owned(),
        source,
    })
}

/// The configuration that the runtime takes: the named one, or the first usable one that is not our own.
fn primary(settings: &Settings, own: Option<&str>) -> Result<(PathBuf, String), InstallError> {
    if let Some(name) = &settings.config_name {
        // It was renamed when it was wrapped.
        let named = settings.config_folder.join(name);
        let list = named.with_extension("conflist");
        let path = if named.exists() { named } else { list };
        return match fs::read_to_string(&path) {
            Ok(text) => Ok((path, text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(no_primary(settings)),
            Err(source) => Err(config_error(&path, source)),
        };
    }
    let others = candidates(settings).into_iter().filter(|path| {
        let name = file_name(path);
        Some(name.as_str()) != own && name != STANDALONE_FILE
    });
    let read = |path: PathBuf| Some((path.clone(), fs::read_to_string(path).ok()?));
    others
        .filter_map(read)
        .find(|(_, text)| conflist::is_usable(text))
        .ok_or_else(|| no_primary(settings))
}

/// What a runtime looks at, in its order.
fn candidates(settings: &Settings) -> Vec<PathBuf> {
    let entries = fs::read_dir(&settings.config_folder).into_iter().flatten();
    let ending = |path: &PathBuf| {
        path.extension()
            .is_some_and(|ending| ending == "conf" || ending == "conflist")
    };
    let mut paths: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(ending)
        .collect();
    paths.sort();
    paths
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn no_primary(settings: &Settings) -> InstallError {
    InstallError::NoPrimary {
        folder: settings.config_folder.clone(),
    }
}

fn config_error(path: &Path, source: io::Error) -> InstallError {
    InstallError::Config {
        path: path.to_owned(),
        source,
    }
}

fn put(path: &Path, text: &str, mode: u32) -> Result<bool, InstallError> {
    files::put(path, text.as_bytes(), mode).map_err(|source| config_error(path, source))
}

impl Settings {
    fn own_mode(&self) -> u32 {
        if self.group_may_read { 0o640 } else { 0o600 }
    }
}

/// Keeps the plugin installed until dropped; the gate is open while it is.
pub(crate) struct Keeper {
    settings: Settings,
    gate: Gate,
    telemetry: Telemetry,
    /// Held while files are written, also when nobody waits for that any more.
    writing: Arc<Mutex<()>>,
}

impl Keeper {
    pub(crate) fn new(settings: Settings, gate: Gate, telemetry: Telemetry) -> Self {
        Keeper {
            settings,
            gate,
            telemetry,
            writing: Arc::default(),
        }
    }

    /// Until the mesh leaves the node: then the entry is taken out.
    pub(crate) async fn run(self, mut leaving: watch::Receiver<bool>) {
        tokio::select! {
            () = self.keep() => {}
            _ = leaving.wait_for(|leaving| *leaving) => {}
        }
        // One that is still writing ends first.
        let _one = self.writing.lock().await;
        if let Err(error) = remove_entry(&self.settings) {
            tracing::error!(
                error = chain(&error),
                "take the plugin out of the CNI configuration"
            );
        }
    }

    async fn keep(&self) {
        let mut changes = None;
        let mut fight = Fight::default();
        let mut told = None;
        loop {
            let next = Instant::now() + REINSTALL_PAUSE;
            changes = self.watch(changes);
            let (wait, outcome) = match self.install().await {
                Ok(written) => {
                    self.installed(written, &mut fight);
                    (LOOK_EVERY, None)
                }
                Err(error) => {
                    self.failed(&error);
                    (TRY_AGAIN, Some(chain(&error)))
                }
            };
            if outcome != told {
                if let Some(why) = &outcome {
                    tracing::error!(why, "the CNI plugin is not installed");
                }
                told = outcome;
            }
            sleep_until(next).await;
            match &mut changes {
                Some(changes) => drop(timeout(wait, changes.next()).await),
                None => sleep(wait).await,
            }
        }
    }

    async fn install(&self) -> Result<bool, InstallError> {
        let settings = self.settings.clone();
        let writing = self.writing.clone().lock_owned().await;
        let write = move || {
            let outcome = install(&settings);
            drop(writing);
            outcome
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(outcome) => outcome,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => std::future::pending().await,
            },
        }
    }

    fn installed(&self, written: bool, fight: &mut Fight) {
        self.gate.open();
        self.telemetry.install_ready(true);
        if !written {
            return;
        }
        self.telemetry.installed("SUCCESS");
        tracing::info!(folder = %self.settings.config_folder.display(), "the CNI plugin is installed");
        if fight.again() {
            tracing::warn!(
                folder = %self.settings.config_folder.display(),
                "someone else keeps rewriting the CNI configuration; with Cilium set cni.exclusive=false"
            );
        }
    }

    fn failed(&self, error: &InstallError) {
        self.gate.close();
        self.telemetry.install_ready(false);
        self.telemetry.installed(error.result());
    }

    /// A watch of the folders that are there by now. Without one they are looked at from time to time alone.
    fn watch(&self, before: Option<Watch>) -> Option<Watch> {
        let folders = [&self.settings.config_folder, &self.settings.bin_folder];
        let watch = match before {
            Some(watch) => Ok(watch),
            None => Watch::new(&folders.map(PathBuf::as_path)),
        };
        let followed = watch.and_then(|mut watch| watch.follow().map(|()| watch));
        followed
            .inspect_err(|error| tracing::warn!(%error, "watch the CNI folders"))
            .ok()
    }
}

/// Counts reinstalls that follow each other soon.
#[derive(Debug, Default)]
struct Fight {
    last: Option<Instant>,
    rounds: u32,
}

impl Fight {
    /// Whether this reinstall makes it one; told once per fight.
    fn again(&mut self) -> bool {
        let now = Instant::now();
        let soon = self.last.is_some_and(|last| now - last < FIGHT_WITHIN);
        self.rounds = if soon { self.rounds + 1 } else { 1 };
        self.last = Some(now);
        self.rounds == FIGHT
    }
}

#[cfg(test)]
mod tests;
