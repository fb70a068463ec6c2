//! How every command for operators names its cluster: flags that are istioctl's, so that scripts keep working.

use std::path::PathBuf;

use clap::Args;

/// Which cluster, as whom, and where in it.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct Access {
    /// Kubeconfig file (otherwise $KUBECONFIG, then ~/.kube/config)
    #[arg(long, short = 'c', global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Namespace (otherwise the context's)
    #[arg(long, short, global = true)]
    pub namespace: Option<String>,
    /// Namespace of the mesh's own parts [default: istio-system]
    #[arg(
        long = "istioNamespace",
        alias = "istio-namespace",
        short = 'i',
        global = true,
        value_name = "NAMESPACE",
        env = "ISTIOCTL_ISTIONAMESPACE",
        hide_env = true
    )]
    pub istio_namespace: Option<String>,
    /// User to impersonate
    #[arg(long = "as", global = true, value_name = "USER")]
    pub impersonate: Option<String>,
    /// Group to impersonate; may be repeated
    #[arg(long = "as-group", global = true, value_name = "GROUP")]
    pub impersonate_groups: Vec<String>,
    /// istioctl's, for scripts that set them: there is nothing here to log
    #[arg(long = "log_output_level", global = true, hide = true)]
    log_output_level: Option<String>,
    /// As the one before
    #[arg(long, global = true, hide = true)]
    vklog: Option<String>,
}

/// Where the mesh's parts are unless told otherwise.
const ISTIO_NAMESPACE: &str = "istio-system";

impl Access {
    /// What was given after the command, and for the rest what was given before it.
    pub(crate) fn or(self, before: &Self) -> Self {
        let groups = match self.impersonate_groups.is_empty() {
            true => before.impersonate_groups.clone(),
            false => self.impersonate_groups,
        };
        Self {
            kubeconfig: self.kubeconfig.or_else(|| before.kubeconfig.clone()),
            context: self.context.or_else(|| before.context.clone()),
            namespace: self.namespace.or_else(|| before.namespace.clone()),
            istio_namespace: self
                .istio_namespace
                .or_else(|| before.istio_namespace.clone()),
            impersonate: self.impersonate.or_else(|| before.impersonate.clone()),
            impersonate_groups: groups,
            log_output_level: self.log_output_level,
            vklog: self.vklog,
        }
    }

    /// The namespace of the mesh's parts.
    pub(crate) fn istio_namespace(&self) -> &str {
        self.istio_namespace.as_deref().unwrap_or(ISTIO_NAMESPACE)
    }
}
