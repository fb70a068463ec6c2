//! The access log: one line per connection, and a short one for what was refused early.
//!
//! What a line says is decided in [`FlowRecord::fields`]; here it is written.

use mesh::flow::{AccessFields, FlowRecord};

/// The one event shape of the access log; tracing fixes an event's level and message where it is written, hence a
/// macro and not a function. Fields that are `None` are left out.
macro_rules! line {
    ($level:ident, $fields:expr, $message:literal) => {{
        let fields: &AccessFields<'_> = $fields;
        let duration = fields.duration.map(|it| format!("{}ms", it.as_millis()));
        tracing::event!(
            target: "access",
            tracing::Level::$level,
            src.addr = %fields.source_addr,
            src.workload = fields.source.workload,
            src.namespace = fields.source.namespace,
            src.cluster = fields.source.cluster,
            src.identity = fields.source.identity,
            dst.addr = %fields.destination_addr,
            dst.hbone_addr = fields.authority.map(tracing::field::display),
            dst.service = fields.service,
            dst.workload = fields.destination.workload,
            dst.namespace = fields.destination.namespace,
            dst.cluster = fields.destination.cluster,
            dst.identity = fields.destination.identity,
            policy = fields.policy.as_deref(),
            end = fields.end.as_deref(),
            direction = fields.direction.as_str(),
            bytes_sent = fields.bytes_sent,
            bytes_recv = fields.bytes_received,
            duration = duration.as_deref(),
            error = fields.error.as_deref(),
            $message
        );
    }};
}

/// At DEBUG: traffic begins.
pub fn opened(record: &FlowRecord) {
    // The fields take some making, for a line that is hardly ever asked for.
    if !tracing::enabled!(target: "access", tracing::Level::DEBUG) {
        return;
    }
    line!(DEBUG, &record.fields(), "connection opened");
}

/// It has ended: at INFO, or at ERROR where it did not end well.
pub fn complete(record: &FlowRecord) {
    let fields = record.fields();
    match fields.error {
        None => line!(INFO, &fields, "connection complete"),
        Some(_) => line!(ERROR, &fields, "connection complete"),
    }
}

/// At WARN: refused before anything was carried. Says nothing of bytes and time.
pub fn failed(record: &FlowRecord) {
    let fields = AccessFields {
        bytes_sent: None,
        bytes_received: None,
        duration: None,
        ..record.fields()
    };
    line!(WARN, &fields, "connection failed");
}
