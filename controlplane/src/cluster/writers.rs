//! Everything that is written to a cluster, under one lease.

use std::{future::Future, sync::Arc};

use kube::Client;
use net::drain;
use rustls::server::ResolvesServerCert;
use tokio::{net::TcpListener, sync::watch};

use super::{
    Discovery,
    ca_store::CaStore,
    leader::{Elector, Leadership},
    roots::{self, Roots},
    status::{self, Statuses},
    webhook::Webhook,
    webhook_config::{self, WebhookConfig},
};
use crate::{gateway::names::of_revision, metrics::Metrics, world::World};

/// What the writers need.
pub struct Writers {
    /// The API server.
    pub client: Client,
    /// The control plane's own namespace.
    pub namespace: String,
    /// Its revision; `default` or empty is the default one.
    pub revision: String,
    /// Names this replica among all of them.
    pub identity: String,
    /// The certificate authority.
    pub ca: Arc<CaStore>,
    /// What is to be said of users' objects.
    pub world: World,
    /// Which namespaces the mesh looks at.
    pub discovery: watch::Receiver<Discovery>,
    /// Where certificates' ends are told.
    pub metrics: Arc<Metrics>,
}

impl Writers {
    /// The election of the replica that writes: run the first, ask the second.
    pub fn election(&self) -> (Elector, Leadership) {
        let named = |name| of_revision(name, &self.revision);
        let (namespace, me) = (&self.namespace, self.identity.clone());
        let client = self.client.clone();
        let (elector, leadership) =
            Elector::new(client.clone(), namespace, named("leyline-leader"), me);
        // The chart's names.
        let elector = elector.of_deployment(client, namespace, named("istiod"));
        (elector, leadership)
    }

    /// Takes part in the election and writes while it leads, until `stop` completes; then gives the lease back.
    pub async fn run(
        self,
        (elector, leadership): (Elector, Leadership),
        stop: impl Future<Output = ()>,
    ) {
        let authority = self.ca.current();
        let handouts = [roots::ROOTS, roots::REVOKED].map(|handout| {
            let (client, authority) = (self.client.clone(), authority.clone());
            let roots = Roots::new(handout, client, authority, self.discovery.clone());
            roots.run(leadership.clone())
        });
        let handouts = futures_util::future::join_all(handouts);
        let revision = match self.revision.as_str() {
            "" => "default",
            revision => revision,
        };
        let webhooks = webhook_config::names(&self.namespace, revision)
            .into_iter()
            .map(|name| {
                let tools = (self.ca.current(), self.metrics.clone());
                WebhookConfig::new(self.client.clone(), tools, &self.namespace, revision, name)
            })
            .map(|config| config.run(leadership.clone()));
        let webhooks = futures_util::future::join_all(webhooks);
        let world = self.world;
        let statuses = Statuses::new(self.client, move || status::changes(&world));
        let work = async {
            tokio::join!(
                self.ca.keep(leadership.clone(), self.metrics),
                handouts,
                webhooks,
                statuses.run(leadership.clone()),
            )
        };
        tokio::select! {
            () = elector.run(stop) => {}
            _ = work => {}
        }
    }
}

/// Answers admission reviews on every replica until the drain starts.
pub async fn admit(
    listener: TcpListener,
    certificate: Arc<dyn ResolvesServerCert>,
    metrics: Arc<Metrics>,
    drain: drain::Watch,
) {
    let served = Webhook::new(metrics).serve(listener, certificate, drain);
    if let Err(error) = served.await {
        let error = &error as &dyn std::error::Error;
        tracing::error!(error, "admission reviews cannot be answered");
    }
}
