//! Which other clusters Secrets name, and by which credentials they are looked at. Pure.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use k8s_openapi::ByteString;
use kube::config::{AuthInfo, Cluster, Kubeconfig};
use mesh::names::Str;

/// Clusters that are looked at; each costs an informer per kind and a thread. Those that come after by name are refused.
const MOST: usize = 64;
/// A kubeconfig with certificates is a few KiB.
const MAX_KUBECONFIG: usize = 256 << 10;

/// The `data` of Secrets, by their names.
pub(super) type Secrets = BTreeMap<Str, BTreeMap<String, ByteString>>;

/// A cluster that is to be looked at.
#[derive(Clone)]
pub(super) struct Wanted {
    /// The Secret that names it.
    pub(super) secret: Str,
    /// How it is reached.
    pub(super) kubeconfig: Arc<Kubeconfig>,
    /// Of what the Secret has: another one means other credentials.
    pub(super) digest: u64,
}

/// A cluster that a Secret names and that is not looked at by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// The cluster.
    pub(super) cluster: Str,
    /// The Secret.
    pub(super) secret: Str,
    /// Why, for people.
    pub(super) why: String,
}

/// What the Secrets ask for. Where two name the same cluster, the first by name counts.
pub(super) fn wanted(own: &str, secrets: &Secrets) -> (BTreeMap<Str, Wanted>, Vec<Refused>) {
    let (mut all, mut refused) = (BTreeMap::<Str, Wanted>::new(), Vec::new());
    let entries = secrets.iter().flat_map(|(secret, data)| {
        let of_secret = move |(cluster, text)| (secret, cluster, text);
        data.iter().map(of_secret)
    });
    for (secret, cluster, ByteString(text)) in entries {
        let cluster: Str = cluster.as_str().into();
        let read = match all.get(&cluster) {
            _ if *cluster == *own => Err("it is this cluster's own name".to_owned()),
            Some(known) => Err(format!("the Secret {} names it, too", known.secret)),
            None if all.len() == MOST => Err(format!("there are {MOST} before it by name")),
            None => read(text),
        };
        match read {
            Ok(kubeconfig) => {
                let mut hasher = DefaultHasher::new();
                text.hash(&mut hasher);
                let wanted = Wanted {
                    secret: secret.clone(),
                    kubeconfig: Arc::new(kubeconfig),
                    digest: hasher.finish(),
                };
                all.insert(cluster, wanted);
            }
            Err(why) => refused.push(Refused {
                cluster,
                secret: secret.clone(),
                why,
            }),
        }
    }
    (all, refused)
}

fn read(text: &[u8]) -> Result<Kubeconfig, String> {
    if text.len() > MAX_KUBECONFIG {
        return Err(format!("the kubeconfig has over {MAX_KUBECONFIG} bytes"));
    }
    // What the parser says may quote what it has read, credentials among it.
    let text = std::str::from_utf8(text).map_err(|_| "the kubeconfig is no text".to_owned())?;
    let config =
        Kubeconfig::from_yaml(text).map_err(|_| "the kubeconfig cannot be parsed".to_owned())?;
    if config
        .current_context
        .as_deref()
        .unwrap_or_default()
        .is_empty()
    {
        return Err("the kubeconfig has no current-context".to_owned());
    }
    let users = config
        .auth_infos
        .iter()
        .filter_map(|it| it.auth_info.as_ref());
    let clusters = config.clusters.iter().filter_map(|it| it.cluster.as_ref());
    let wrong = users
        .filter_map(unsafe_user)
        .chain(clusters.filter_map(unsafe_cluster))
        .next();
    match wrong {
        Some(what) => Err(format!("the kubeconfig {what}")),
        None => Ok(config),
    }
}

/// Whoever may write a Secret must not run programs in the control plane, or read its files.
fn unsafe_user(user: &AuthInfo) -> Option<&'static str> {
    let is_there = [
        (user.exec.is_some(), "has exec, which is not run"),
        (
            user.auth_provider.is_some(),
            "has auth-provider, which is not run",
        ),
        (
            user.token_file.is_some(),
            "names a token file; give the token",
        ),
        (
            user.client_certificate.is_some() || user.client_key.is_some(),
            "names files of a client certificate; give their data",
        ),
    ];
    is_there
        .into_iter()
        .find_map(|(there, what)| there.then_some(what))
}

fn unsafe_cluster(cluster: &Cluster) -> Option<&'static str> {
    let server = cluster.server.as_deref().unwrap_or_default();
    let is_there = [
        (
            cluster.certificate_authority.is_some(),
            "names a file of the certificate authority; give its data",
        ),
        (
            cluster.insecure_skip_tls_verify == Some(true),
            "says insecure-skip-tls-verify: who the API server is would be unknown",
        ),
        (
            !server.starts_with("https://"),
            "has a server that is not https",
        ),
    ];
    is_there
        .into_iter()
        .find_map(|(there, what)| there.then_some(what))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A kubeconfig that nothing is wrong with, with more lines for its user and its cluster.
    pub(in super::super) fn kubeconfig(user: &str, cluster: &str) -> String {
        format!(
            "
apiVersion: v1
kind: Config
current-context: it
contexts: [{{name: it, context: {{cluster: it, user: it}}}}]
clusters: [{{name: it, cluster: {{server: 'https://192.0.2.1:6443'{cluster}}}}}]
users: [{{name: it, user: {{token: t{user}}}}}]
"
        )
    }

    fn secrets(all: &[(&str, &str, &str)]) -> Secrets {
        let mut secrets = Secrets::new();
        for (secret, cluster, text) in all {
            let data = secrets.entry((*secret).into()).or_default();
            data.insert((*cluster).to_owned(), ByteString(text.as_bytes().to_vec()));
        }
        secrets
    }

    #[test]
    fn kubeconfigs_that_run_programs_read_files_or_trust_anyone_are_refused_by_name() {
        for (user, cluster, why) in [
            (", exec: {command: sh}", "", "exec"),
            (
                ", auth-provider: {name: gcp, config: {}}",
                "",
                "auth-provider",
            ),
            (", tokenFile: /etc/shadow", "", "token file"),
            (", client-key: /etc/shadow", "", "client certificate"),
            (
                ", client-certificate: /etc/shadow",
                "",
                "client certificate",
            ),
            (
                "",
                ", certificate-authority: /etc/shadow",
                "certificate authority",
            ),
            ("", ", insecure-skip-tls-verify: true", "insecure"),
        ] {
            let bad = kubeconfig(user, cluster);
            let good = kubeconfig("", "");
            let secrets = secrets(&[("a", "east", &bad), ("b", "west", &good)]);
            let (wanted, refused) = wanted("here", &secrets);
            assert_eq!(wanted.keys().map(|it| &**it).collect::<Vec<_>>(), ["west"]);
            assert_eq!((&*refused[0].cluster, &*refused[0].secret), ("east", "a"));
            assert!(refused[0].why.contains(why), "{}", refused[0].why);
        }
        for text in ["", "[", "current-context: ''"] {
            assert_eq!(wanted("here", &secrets(&[("a", "east", text)])).1.len(), 1);
        }
        let plain = kubeconfig("", "").replace("https", "http");
        assert_eq!(
            wanted("here", &secrets(&[("a", "east", &plain)])).1.len(),
            1
        );
    }

    #[test]
    fn what_is_wrong_with_a_kubeconfig_is_told_without_what_is_in_it() {
        let (_, refused) = wanted("here", &secrets(&[("a", "east", "token: [hunter2")]));
        assert!(!refused[0].why.contains("hunter2"), "{}", refused[0].why);
    }

    #[test]
    fn the_first_secret_of_a_cluster_counts_and_none_may_name_this_one() {
        let good = kubeconfig("", "");
        let all = secrets(&[
            ("a", "east", &good),
            ("b", "east", &good),
            ("b", "here", &good),
        ]);
        let (wanted, refused) = wanted("here", &all);
        assert_eq!(&*wanted["east"].secret, "a");
        let refused: Vec<_> = refused
            .iter()
            .map(|it| (&*it.secret, &*it.cluster))
            .collect();
        assert_eq!(refused, [("b", "east"), ("b", "here")]);
    }

    #[test]
    fn clusters_are_bounded_in_number() {
        let good = kubeconfig("", "");
        let names: Vec<String> = (0..=MOST).map(|n| format!("cluster-{n:03}")).collect();
        let all: Vec<_> = names
            .iter()
            .map(|name| ("a", name.as_str(), good.as_str()))
            .collect();
        let (wanted, refused) = wanted("here", &secrets(&all));
        assert_eq!((wanted.len(), refused.len()), (MOST, 1));
        assert_eq!(&*refused[0].cluster, "cluster-064");
    }
}
