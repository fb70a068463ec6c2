//! Where each kind of object is put, and read back.

use super::{Inputs, istio};
use crate::{
    graph::{Data, Graph, Key, Source},
    object::{Kind, Object, ObjectRef, Sourced},
    translate::l7::gateway_api::RouteObject,
};

impl Inputs {
    pub(super) fn new(graph: &Graph) -> Self {
        Self {
            namespaces: graph.source(),
            nodes: graph.source(),
            pods: graph.source(),
            services: graph.source(),
            slices: graph.source(),
            entries: graph.source(),
            workload_entries: graph.source(),
            gateways: graph.source(),
            gateways_elsewhere: graph.source(),
            classes: graph.source(),
            policies: graph.source(),
            peers: graph.source(),
            routes: graph.source(),
            backend_tls: graph.source(),
            backend_traffic: graph.source(),
            config_maps: graph.source(),
            remotes: graph.source(),
            istio: istio::Inputs::new(graph),
        }
    }

    pub(super) fn get(&self, object: &ObjectRef) -> Option<Sourced<Object>> {
        let name = &object.name;
        let good = |object: Object| Sourced {
            object,
            faults: Vec::new(),
        };
        match object.kind {
            Kind::AuthorizationPolicy => self.policies.peek(name).map(|it| Sourced {
                object: Object::AuthorizationPolicy(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::PeerAuthentication => self.peers.peek(name).map(|it| Sourced {
                object: Object::PeerAuthentication(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::EndpointSlice => copy(&self.slices, name, Object::EndpointSlice).map(good),
            Kind::Gateway => copy(&self.gateways, name, Object::Gateway).map(good),
            Kind::GatewayClass => copy(&self.classes, &name.name, Object::GatewayClass).map(good),
            Kind::Namespace => copy(&self.namespaces, &name.name, Object::Namespace).map(good),
            Kind::Node => copy(&self.nodes, &name.name, Object::Node).map(good),
            Kind::Pod => copy(&self.pods, name, Object::Pod).map(good),
            Kind::Service => copy(&self.services, name, Object::Service).map(good),
            Kind::ServiceEntry => copy(&self.entries, name, Object::ServiceEntry).map(good),
            Kind::WorkloadEntry => {
                copy(&self.workload_entries, name, Object::WorkloadEntry).map(good)
            }
            Kind::GrpcRoute | Kind::HttpRoute | Kind::TcpRoute | Kind::TlsRoute => {
                self.routes.peek(object).map(|it| Sourced {
                    object: it.object.clone().into_object(),
                    faults: it.faults.clone(),
                })
            }
            Kind::BackendTlsPolicy => self.backend_tls.peek(name).map(|it| Sourced {
                object: Object::BackendTlsPolicy(it.object.clone()),
                faults: it.faults.clone(),
            }),
            Kind::BackendTrafficPolicy => {
                copy(&self.backend_traffic, name, Object::BackendTrafficPolicy).map(good)
            }
            Kind::ConfigMap => copy(&self.config_maps, name, Object::ConfigMap).map(good),
            Kind::Deployment | Kind::ReferenceGrant | Kind::ServiceAccount => None,
            _ => self.istio.get(object),
        }
    }

    /// What is another control plane's and matters here, as a fact, all the same.
    pub(super) fn set_elsewhere(&self, object: &ObjectRef, value: Option<&Sourced<Object>>) {
        if object.kind == Kind::Gateway {
            let gateway = value.cloned();
            self.gateways_elsewhere
                .set(&object.name, take!(gateway, Gateway));
        }
    }

    pub(super) fn set(&self, object: &ObjectRef, value: Option<Sourced<Object>>) {
        let name = &object.name;
        match object.kind {
            Kind::AuthorizationPolicy => self
                .policies
                .set(name, take!(value, AuthorizationPolicy, faulty)),
            Kind::PeerAuthentication => self
                .peers
                .set(name, take!(value, PeerAuthentication, faulty)),
            Kind::EndpointSlice => self.slices.set(name, take!(value, EndpointSlice)),
            Kind::Gateway => self.gateways.set(name, take!(value, Gateway)),
            Kind::GatewayClass => self.classes.set(&name.name, take!(value, GatewayClass)),
            Kind::Namespace => self.namespaces.set(&name.name, take!(value, Namespace)),
            Kind::Node => self.nodes.set(&name.name, take!(value, Node)),
            Kind::Pod => self.pods.set(name, take!(value, Pod)),
            Kind::Service => self.services.set(name, take!(value, Service)),
            Kind::ServiceEntry => self.entries.set(name, take!(value, ServiceEntry)),
            Kind::WorkloadEntry => self.workload_entries.set(name, take!(value, WorkloadEntry)),
            Kind::GrpcRoute | Kind::HttpRoute | Kind::TcpRoute | Kind::TlsRoute => {
                let route = value.and_then(|sourced| {
                    Some(Sourced {
                        object: RouteObject::of(sourced.object)?,
                        faults: sourced.faults,
                    })
                });
                self.routes.set(object, route);
            }
            Kind::BackendTlsPolicy => self
                .backend_tls
                .set(name, take!(value, BackendTlsPolicy, faulty)),
            Kind::BackendTrafficPolicy => self
                .backend_traffic
                .set(name, take!(value, BackendTrafficPolicy)),
            Kind::ConfigMap => self.config_maps.set(name, take!(value, ConfigMap)),
            Kind::Deployment | Kind::ReferenceGrant | Kind::ServiceAccount => {}
            _ => self.istio.set(object, value),
        }
    }
}

pub(super) fn copy<K: Key, V: Data + Clone>(
    source: &Source<K, V>,
    key: &K,
    of: impl FnOnce(V) -> Object,
) -> Option<Object> {
    source.peek(key).map(|value| of((*value).clone()))
}
