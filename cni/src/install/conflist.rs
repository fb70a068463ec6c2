//! Our entry in the cluster's CNI configuration. Pure: texts in, texts out.

use super::json::Json;

/// The plugin's name: of its file, and of its entry's `type`. Istio's own, so that each takes over the other's.
pub(super) const PLUGIN: &str = "istio-cni";
/// For a list that is made of a single plugin's configuration. Source: `spec/cni.md` 3.
const WRAPPED_NAME: &str = "k8s-pod-network";
const WRAPPED_VERSION: &str = "0.3.1";

/// What our entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The folder with the agent's socket, as the host names it.
    pub run_folder: String,
    /// Whether pods are put to the agent at all.
    pub ambient_enabled: bool,
    /// Namespaces whose pods pass.
    pub excluded_namespaces: Vec<String>,
    /// Where the agent's own pods are, which pass.
    pub agent_namespace: String,
}

/// Why a text cannot be chained into.
#[derive(Debug, thiserror::Error)]
pub enum ConflistError {
    /// Not JSON.
    #[error("not JSON")]
    Json(#[source] serde_json::Error),
    /// Another kind of JSON.
    #[error("neither a plugin's configuration nor a list of them")]
    Shape,
}

/// What a text is.
#[derive(Debug)]
enum Config {
    /// `{"name", "cniVersion", "plugins": […]}`.
    List(Json),
    /// One plugin: `{"type", …}`.
    Single(Json),
}

impl Config {
    fn read(text: &str) -> Result<Config, ConflistError> {
        let json: Json = serde_json::from_str(text).map_err(ConflistError::Json)?;
        if let Some(plugins) = json.get("plugins") {
            let plugins = plugins.as_list().ok_or(ConflistError::Shape)?;
            let typed = |plugin: &Json| plugin.get("type").is_some();
            let usable = plugins.iter().all(typed) && plugins.iter().any(|plugin| !is_ours(plugin));
            return if usable {
                Ok(Config::List(json))
            } else {
                Err(ConflistError::Shape)
            };
        }
        let kind = json.get("type").and_then(Json::as_text);
        if kind.is_some_and(|kind| !kind.is_empty() && kind != PLUGIN) {
            Ok(Config::Single(json))
        } else {
            Err(ConflistError::Shape)
        }
    }
}

/// Whether a runtime could set a pod up with this text.
pub(super) fn is_usable(text: &str) -> bool {
    Config::read(text).is_ok()
}

/// The text as a list whose last entry is ours. One that is so already comes back as it is, to the byte.
///
/// # Errors
/// [`ConflistError`].
pub(super) fn chain(text: &str, entry: &Entry) -> Result<String, ConflistError> {
    let mut list = match Config::read(text)? {
        Config::List(list) => list,
        Config::Single(plugin) => wrap(plugin),
    };
    let entry = entry.json();
    if list
        .get("plugins")
        .is_some_and(|plugins| is_chained(plugins, &entry))
    {
        return Ok(text.to_owned());
    }
    if let Some(Json::Array(plugins)) = list.get_mut("plugins") {
        plugins.retain(|plugin| !is_ours(plugin));
        plugins.push(entry);
    }
    Ok(list.pretty())
}

/// The text without our entry; `None` where it has none.
pub(super) fn unchain(text: &str) -> Option<String> {
    let mut list: Json = serde_json::from_str(text).ok()?;
    let Some(Json::Array(plugins)) = list.get_mut("plugins") else {
        return None;
    };
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    (plugins.len() < before).then(|| list.pretty())
}

/// Our entry alone: for a network that others chain themselves.
pub(super) fn standalone(entry: &Entry) -> String {
    let mut fields = vec![("cniVersion".to_owned(), Json::text(WRAPPED_VERSION))];
    if let Json::Object(entry) = entry.json() {
        fields.extend(entry);
    }
    Json::Object(fields).pretty()
}

/// Inside a list the list's version counts.
fn wrap(mut plugin: Json) -> Json {
    let name = plugin.get("name").cloned();
    let version = plugin.get("cniVersion").cloned();
    if let Json::Object(fields) = &mut plugin {
        fields.retain(|(name, _)| name != "cniVersion");
    }
    Json::Object(vec![
        (
            "name".to_owned(),
            name.unwrap_or_else(|| Json::text(WRAPPED_NAME)),
        ),
        (
            "cniVersion".to_owned(),
            version.unwrap_or_else(|| Json::text(WRAPPED_VERSION)),
        ),
        ("plugins".to_owned(), Json::Array(vec![plugin])),
    ])
}

/// Ours is there once, as it should be, and last.
fn is_chained(plugins: &Json, entry: &Json) -> bool {
    let plugins = plugins.as_list().unwrap_or_default();
    let ours = plugins.iter().filter(|plugin| is_ours(plugin)).count();
    ours == 1 && plugins.last() == Some(entry)
}

fn is_ours(plugin: &Json) -> bool {
    plugin.get("type").and_then(Json::as_text) == Some(PLUGIN)
}

impl Entry {
    /// Istio's keys. Which pods take part is not among them: the agent decides that.
    fn json(&self) -> Json {
        let names = self.excluded_namespaces.iter();
        let excluded = names.map(|name| Json::text(name)).collect();
        let fields = [
            ("name", Json::text(PLUGIN)),
            ("type", Json::text(PLUGIN)),
            ("plugin_log_level", Json::text("info")),
            ("cni_agent_run_dir", Json::text(&self.run_folder)),
            ("ambient_enabled", Json::Plain(self.ambient_enabled.into())),
            ("exclude_namespaces", Json::Array(excluded)),
            ("pod_namespace", Json::text(&self.agent_namespace)),
            ("native_nftables", Json::Plain(true.into())),
        ];
        Json::Object(fields.map(|(name, value)| (name.to_owned(), value)).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry {
            run_folder: "/var/run/istio-cni".into(),
            ambient_enabled: true,
            excluded_namespaces: vec!["kube-system".into()],
            agent_namespace: "istio-system".into(),
        }
    }

    /// `LEYLINE_UPDATE_GOLDENS=1` writes them anew.
    #[track_caller]
    fn golden(name: &str, text: &str) {
        let path = format!(
            "{}/tests/golden/conflist/{name}",
            env!("CARGO_MANIFEST_DIR")
        );
        if std::env::var_os("LEYLINE_UPDATE_GOLDENS").is_some() {
            std::fs::write(&path, text).expect("write a golden");
        }
        let expected = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(text, expected, "{name}");
    }

    const LIST: &str = r#"{ "name": "kindnet", "zebra": {"b": 1, "a": [1.5, null, "x"]}, "cniVersion": "1.0.0",
        "plugins": [ {"type": "ptp", "mtu": 1500, "ipam": {"type": "host-local"}}, {"type": "portmap", "capabilities": {"portMappings": true}} ],
        "alpha": false }"#;

    #[test]
    fn the_entry_is_appended_and_everything_else_stays_in_its_order() {
        golden("list.conflist", &chain(LIST, &entry()).expect("chained"));
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let conf = r#"{"cniVersion":"0.4.0","type":"weave-net","name":"weave","hairpinMode":true}"#;
        golden("single.conflist", &chain(conf, &entry()).expect("chained"));
        let bare = r#"{"type":"calico"}"#;
        golden("bare.conflist", &chain(bare, &entry()).expect("chained"));
    }

    #[test]
    fn chaining_again_changes_no_byte() {
        let once = chain(LIST, &entry()).expect("chained");
        assert_eq!(chain(&once, &entry()).expect("chained"), once);
        let reformatted = once.replace('\n', " ");
        assert_eq!(chain(&reformatted, &entry()).expect("chained"), reformatted);
    }

    #[test]
    fn istios_own_entry_is_taken_over_in_place() {
        let istios = r#"{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"ptp"},
            {"ambient_enabled":true,"cni_agent_run_dir":"/var/run/istio-cni","enablement_selectors":[],"exclude_namespaces":["kube-system"],
             "kubernetes":{"kubeconfig":"/x"},"name":"istio-cni","plugin_log_level":"info","type":"istio-cni"},{"type":"later"}]}"#;
        let chained = chain(istios, &entry()).expect("chained");
        golden("taken-over.conflist", &chained);
        assert_eq!(chained.matches(r#""type": "istio-cni""#).count(), 1);
    }

    #[test]
    fn removal_gives_back_what_was_there() {
        let chained = chain(LIST, &entry()).expect("chained");
        let removed = unchain(&chained).expect("had ours");
        let (before, after): (Json, Json) = (
            serde_json::from_str(LIST).expect("JSON"),
            serde_json::from_str(&removed).expect("JSON"),
        );
        assert_eq!(before, after);
        assert_eq!(unchain(LIST), None);
        assert_eq!(unchain("{"), None);
    }

    #[test]
    fn alone_it_is_a_plugins_configuration() {
        golden("standalone.conf", &standalone(&entry()));
    }

    #[test]
    fn what_no_runtime_could_use_is_refused() {
        for bad in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"plugins":[]}"#,
            r#"{"plugins":{}}"#,
            r#"{"plugins":[{"name":"x"}]}"#,
            r#"{"plugins":[{"type":"istio-cni"}]}"#,
            r#"{"type":""}"#,
            r#"{"type":"istio-cni"}"#,
        ] {
            assert!(!is_usable(bad), "{bad}");
            assert!(chain(bad, &entry()).is_err(), "{bad}");
        }
        assert!(is_usable(LIST));
    }
}
