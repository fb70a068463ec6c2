//! ZDS messages: the bytes of one packet, read and written. No socket is touched here.

use std::os::fd::OwnedFd;

use prost::Message;
use proto::zds as wire;

use super::{MAX_PACKET, PacketError, ProtocolError, Received, Request, Version, WorkloadInfo};
use crate::netns::{Netns, NetnsError};

/// What arrived in one piece.
#[derive(Debug)]
pub struct Packet {
    /// At most [`MAX_PACKET`].
    pub bytes: Vec<u8>,
    /// What came beside them.
    pub descriptors: Vec<OwnedFd>,
    /// More came, and was lost: this process may open no more files, or there were too many.
    pub lost: bool,
}

/// What a tunnel says first.
pub fn encode_hello(version: Version) -> Vec<u8> {
    let version = match version {
        Version::V1 => wire::Version::V1,
        Version::V2 => wire::Version::V2,
    };
    let version = version.into();
    wire::ZdsHello { version }.encode_to_vec()
}

/// Done, or why not. The text is cut to fit a packet.
pub fn encode_response(result: Result<(), &str>) -> Vec<u8> {
    // Room for the tags and lengths of the message around the text.
    const ROOM: usize = MAX_PACKET - 16;
    let error = result.err().unwrap_or_default();
    let cut = (0..=ROOM.min(error.len()))
        .rev()
        .find(|&at| error.is_char_boundary(at))
        .unwrap_or(0);
    let ack = wire::Ack {
        error: error[..cut].to_owned(),
    };
    let payload = Some(wire::workload_response::Payload::Ack(ack));
    wire::WorkloadResponse { payload }.encode_to_vec()
}

/// The version that a Hello settles on; one above ours counts as ours.
///
/// # Errors
/// [`ProtocolError`]: not a Hello.
pub fn decode_hello(packet: &Packet) -> Result<Version, ProtocolError> {
    no_descriptors(packet, "Hello")?;
    let hello = wire::ZdsHello::decode(packet.bytes.as_slice());
    let hello = hello.map_err(|source| ProtocolError::Decode {
        message: "Hello",
        source,
    })?;
    match hello.version {
        1 => Ok(Version::V1),
        2.. => Ok(Version::V2),
        _ => Err(ProtocolError::UnknownVersion),
    }
}

/// An acknowledgement: none, or why the request was not carried out.
///
/// # Errors
/// [`ProtocolError`]: not an acknowledgement.
pub fn decode_response(packet: &Packet) -> Result<Option<String>, ProtocolError> {
    no_descriptors(packet, "Ack")?;
    let response = wire::WorkloadResponse::decode(packet.bytes.as_slice());
    let response = response.map_err(|source| ProtocolError::Decode {
        message: "Ack",
        source,
    })?;
    match response.payload {
        Some(wire::workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(None),
        Some(wire::workload_response::Payload::Ack(ack)) => Ok(Some(ack.error)),
        None => Err(ProtocolError::UnknownResponse),
    }
}

/// A request without its descriptor, which goes beside the bytes.
pub fn encode_request(request: &Request) -> Vec<u8> {
    use wire::workload_request::Payload;
    let payload = match request.clone() {
        Request::Add { uid, info, .. } => Payload::Add(wire::AddWorkload {
            uid,
            workload_info: Some(wire::WorkloadInfo {
                name: info.name,
                namespace: info.namespace,
                service_account: info.service_account,
            }),
        }),
        Request::Keep { uid } => Payload::Keep(wire::KeepWorkload { uid }),
        Request::Delete { uid } => Payload::Del(wire::DelWorkload { uid }),
        Request::SnapshotSent => Payload::SnapshotSent(wire::SnapshotSent {}),
        Request::Drain { uid } => Payload::Drain(wire::DrainWorkload { uid }),
    };
    let payload = Some(payload);
    wire::WorkloadRequest { payload }.encode_to_vec()
}

/// A request with its descriptor.
///
/// # Errors
/// [`ProtocolError`]: not a request, or not the descriptors that it takes.
pub fn decode_request(packet: Packet) -> Result<Received, ProtocolError> {
    use wire::workload_request::Payload;
    let request = wire::WorkloadRequest::decode(packet.bytes.as_slice());
    let request = request.map_err(|source| ProtocolError::Decode {
        message: "request",
        source,
    })?;
    let plain = match request.payload.ok_or(ProtocolError::UnknownRequest)? {
        Payload::Add(add) => return decode_add(add, packet),
        Payload::Keep(keep) => Request::Keep {
            uid: named("Keep", keep.uid)?,
        },
        Payload::Del(del) => Request::Delete {
            uid: named("Del", del.uid)?,
        },
        Payload::SnapshotSent(_) => Request::SnapshotSent,
        Payload::Drain(drain) => Request::Drain {
            uid: named("Drain", drain.uid)?,
        },
    };
    no_descriptors(&packet, "a request other than Add")?;
    Ok(Received::Request(plain))
}

fn decode_add(add: wire::AddWorkload, packet: Packet) -> Result<Received, ProtocolError> {
    let uid = named("Add", add.uid)?;
    let Some(info) = add.workload_info else {
        return Err(ProtocolError::NoWorkloadInfo { uid });
    };
    if packet.lost {
        return Ok(Received::BadNamespace {
            uid,
            error: NetnsError::Lost,
        });
    }
    let count = packet.descriptors.len();
    let mut descriptors = packet.descriptors.into_iter();
    let fd = match (descriptors.next(), descriptors.next()) {
        (Some(fd), None) => fd,
        (None, _) => return Err(ProtocolError::NoDescriptor { uid }),
        (Some(_), Some(_)) => return Err(ProtocolError::ManyDescriptors { uid, count }),
    };
    match Netns::from_fd(fd) {
        Err(error) => Ok(Received::BadNamespace { uid, error }),
        Ok(netns) => Ok(Received::Request(Request::Add {
            uid,
            info: WorkloadInfo {
                name: info.name,
                namespace: info.namespace,
                service_account: info.service_account,
            },
            netns,
        })),
    }
}

fn named(message: &'static str, uid: String) -> Result<String, ProtocolError> {
    match uid.is_empty() {
        true => Err(ProtocolError::NoUid { message }),
        false => Ok(uid),
    }
}

fn no_descriptors(packet: &Packet, message: &'static str) -> Result<(), ProtocolError> {
    match packet.descriptors.len() {
        0 if packet.lost => Err(PacketError::DescriptorsLost.into()),
        0 => Ok(()),
        count => Err(ProtocolError::UnexpectedDescriptor { message, count }),
    }
}
