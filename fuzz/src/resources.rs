//! A response of a control plane: workloads, services and policies, through the checks of the wire, into the view.

use mesh::{
    dump::ConfigDump,
    policy::AuthorizationPolicy,
    service::Service,
    view::{MeshView, Removal, Resource, Update},
    workload::Workload,
};
use prost::Message;
use proto::{security, workload as wire, xds::DeltaDiscoveryResponse};

/// A delta response. A resource survives being written and read; its name removes it, and then nothing is left of it.
pub fn workloads(bytes: &[u8]) {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else {
        return;
    };
    let bodies = response
        .resources
        .iter()
        .filter_map(|it| it.resource.as_ref());
    let upserts: Vec<Resource> = bodies
        .filter_map(|any| match any.type_url.ends_with("Authorization") {
            true => policy(&any.value),
            false => address(&any.value),
        })
        .collect();
    let mut view = MeshView::default();
    view.apply(Update {
        upserts,
        removals: Vec::new(),
    });
    check_indexes(&view);
    check_dump(&view);
    let removed = response.removed_resources.into_iter();
    let removals = removed.map(|name| Removal::Address(name.into())).collect();
    view.apply(Update {
        upserts: Vec::new(),
        removals,
    });
    check_indexes(&view);
    remove_everything(view);
}

fn address(bytes: &[u8]) -> Option<Resource> {
    let wire = wire::Address::decode(bytes).ok()?;
    let resource = Resource::try_from(wire).ok()?;
    match &resource {
        Resource::Workload(it) => {
            let again = Workload::try_from(wire::Workload::from(it));
            assert_eq!(again.as_ref(), Ok(it));
        }
        Resource::Service(it) => {
            let again = Service::try_from(wire::Service::from(it));
            assert_eq!(again.as_ref(), Ok(it));
        }
        Resource::Policy(_) => unreachable!("no Address is a policy"),
    }
    Some(resource)
}

fn policy(bytes: &[u8]) -> Option<Resource> {
    let wire = security::Authorization::decode(bytes).ok()?;
    let policy = AuthorizationPolicy::try_from(wire).ok()?;
    if policy.faults.is_empty() {
        let again = AuthorizationPolicy::try_from(security::Authorization::from(&policy));
        assert_eq!(again.as_ref(), Ok(&policy));
    }
    Some(Resource::Policy(policy))
}

fn check_indexes(view: &MeshView) {
    for workload in view.workloads() {
        assert_eq!(view.workload(&workload.uid), Some(workload));
        for address in workload.own_addresses() {
            assert!(view.workload_at(&address).is_some(), "{address}");
        }
        let _ = view.policies_for(workload);
    }
    for service in view.services() {
        let key = service.key();
        assert_eq!(view.service(&key), Some(service));
        for vip in &service.vips {
            assert!(view.service_at(vip, &service.namespace).is_some(), "{vip}");
        }
        let found = view.service_by_hostname(&service.hostname, &service.namespace);
        assert!(found.is_some(), "{}", service.hostname);
        let _ = view.endpoints(&key).iter().count();
    }
}

/// What the admin port shows is read back as the view that it was.
fn check_dump(view: &MeshView) {
    let dump = ConfigDump::from(view);
    let text = serde_json::to_string(&dump).expect("JSON");
    let read: ConfigDump = serde_json::from_str(&text).expect("what is shown can be read");
    assert_eq!(ConfigDump::from(&read.into_view()), dump);
}

fn remove_everything(mut view: MeshView) {
    let workloads: Vec<_> = view.workloads().map(|it| it.uid.0.clone()).collect();
    let services: Vec<_> = view
        .services()
        .map(|it| it.key().to_string().into())
        .collect();
    let policies: Vec<_> = view
        .policies()
        .map(|it| it.key.to_string().into())
        .collect();
    let (workloads, services) = (workloads.into_iter(), services.into_iter());
    let removals = workloads
        .chain(services)
        .map(Removal::Address)
        .chain(policies.into_iter().map(Removal::Policy))
        .collect();
    view.apply(Update {
        upserts: Vec::new(),
        removals,
    });
    assert_eq!(view.sizes(), [0, 0, 0]);
    assert_eq!(view.staged().count(), 0);
}
