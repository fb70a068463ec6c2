//! The wire: generated types of the protocols that Leyline speaks, and nothing else.
//!
//! Names, packages and field numbers are Istio's and Envoy's, so that either side of each protocol can be
//! theirs; only what a waypoint is told, and a pod's DNS settings, are Leyline's own. Logic and defaults live in `mesh`; gRPC stubs are behind the
//! feature `grpc`.

#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

macro_rules! package {
    ($name:literal) => {
        include!(concat!(env!("OUT_DIR"), "/", $name, ".rs"));
    };
}

/// Istio's packages.
pub mod istio {
    /// `istio.workload`: workloads and services.
    pub mod workload {
        package!("istio.workload");

        /// `istio.workload.zds`: the node agent's protocol.
        pub mod zds {
            package!("istio.workload.zds");
        }
    }

    /// `istio.security`: L4 authorization.
    pub mod security {
        package!("istio.security");
    }

    /// `istio.v1`.
    pub mod v1 {
        /// `istio.v1.auth`: the certificate service.
        pub mod auth {
            package!("istio.v1.auth");
        }
    }
}

/// Envoy's packages.
pub mod envoy {
    /// `envoy.config`.
    pub mod config {
        /// `envoy.config.core`.
        pub mod core {
            /// `envoy.config.core.v3`: node identification.
            pub mod v3 {
                package!("envoy.config.core.v3");
            }
        }
    }

    /// `envoy.service`.
    pub mod service {
        /// `envoy.service.auth`.
        pub mod auth {
            /// `envoy.service.auth.v3`: external authorizers.
            pub mod v3 {
                package!("envoy.service.auth.v3");
            }
        }

        /// `envoy.service.discovery`.
        pub mod discovery {
            /// `envoy.service.discovery.v3`: delta xDS.
            pub mod v3 {
                package!("envoy.service.discovery.v3");
            }
        }
    }
}

/// Google's packages.
pub mod google {
    /// `google.rpc`: the gRPC error model.
    pub mod rpc {
        package!("google.rpc");
    }
}

/// Leyline's own packages.
pub mod leyline {
    /// `leyline.workload`.
    pub mod workload {
        /// `leyline.workload.v1`: what Istio's workload has no field for.
        pub mod v1 {
            package!("leyline.workload.v1");
        }
    }

    /// `leyline.waypoint`.
    pub mod waypoint {
        /// `leyline.waypoint.v1`: what waypoints are told of requests.
        pub mod v1 {
            package!("leyline.waypoint.v1");

            impl std::fmt::Debug for ClientCertificate {
                fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.debug_struct("ClientCertificate").finish_non_exhaustive()
                }
            }
        }
    }
}

/// OpenTelemetry's packages.
pub mod opentelemetry {
    /// `opentelemetry.proto`.
    pub mod proto {
        /// `opentelemetry.proto.common`.
        pub mod common {
            /// `opentelemetry.proto.common.v1`: attributes.
            pub mod v1 {
                package!("opentelemetry.proto.common.v1");
            }
        }

        /// `opentelemetry.proto.resource`.
        pub mod resource {
            /// `opentelemetry.proto.resource.v1`: who tells.
            pub mod v1 {
                package!("opentelemetry.proto.resource.v1");
            }
        }

        /// `opentelemetry.proto.trace`.
        pub mod trace {
            /// `opentelemetry.proto.trace.v1`: spans.
            pub mod v1 {
                package!("opentelemetry.proto.trace.v1");
            }
        }

        /// `opentelemetry.proto.logs`.
        pub mod logs {
            /// `opentelemetry.proto.logs.v1`: log records.
            pub mod v1 {
                package!("opentelemetry.proto.logs.v1");
            }
        }

        /// `opentelemetry.proto.collector`.
        pub mod collector {
            /// `opentelemetry.proto.collector.trace`.
            pub mod trace {
                /// `opentelemetry.proto.collector.trace.v1`.
                pub mod v1 {
                    package!("opentelemetry.proto.collector.trace.v1");
                }
            }

            /// `opentelemetry.proto.collector.logs`.
            pub mod logs {
                /// `opentelemetry.proto.collector.logs.v1`.
                pub mod v1 {
                    package!("opentelemetry.proto.collector.logs.v1");
                }
            }
        }
    }
}

pub use envoy::{config::core::v3 as xds_core, service::discovery::v3 as xds};
pub use istio::{security, v1::auth as ca, workload, workload::zds};
pub use leyline::{waypoint::v1 as waypoint, workload::v1 as workload_extension};

/// Type URL of [`workload::Address`] (workloads and services).
pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`workload::Workload`] alone.
pub const WORKLOAD_TYPE_URL: &str = "type.googleapis.com/istio.workload.Workload";
/// Type URL of [`security::Authorization`].
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of [`workload_extension::PodDns`].
pub const POD_DNS_TYPE_URL: &str = "type.googleapis.com/leyline.workload.v1.PodDns";
/// Type URL of [`waypoint::Resource`].
pub const WAYPOINT_TYPE_URL: &str = "type.googleapis.com/leyline.waypoint.v1.Resource";
