//! The wire form of responses, put together from bodies that are already encoded.
//!
//! Fields of `envoy.service.discovery.v3.DeltaDiscoveryResponse` and `Resource` (node-tunnel.md 3.2) are written by hand
//! here, and nowhere else, because the generated types would copy every body for every subscriber.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use mesh::names::Str;

use super::view::{Sequence, View};
use crate::output::Resource;

/// Size of one piece of a payload: large enough to fill HTTP/2 frames.
const PIECE: usize = 32 * 1024;

/// Bodies from this size on are shared and not copied into a piece.
const LARGE_BODY: usize = PIECE / 2;

/// Part of a response that does not depend on who gets it.
#[derive(Debug, Default)]
pub(super) struct Part {
    pieces: Vec<Bytes>,
    bytes: usize,
    /// What it names, in order.
    pub(super) names: Vec<Str>,
}

/// What brings a reader to a place in the log.
#[derive(Debug)]
pub(super) struct Payload {
    /// The new place.
    pub(super) to: Sequence,
    /// New and altered resources.
    pub(super) upserts: Part,
    /// Names that are no more.
    pub(super) removals: Part,
}

/// Whether resources say by which other names they are known. Only readers on demand need to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aliases {
    Send,
    Omit,
}

pub(super) struct PayloadBuilder<'a> {
    view: View<'a>,
    aliases: Aliases,
    upserts: PartBuilder,
    removals: PartBuilder,
}

#[derive(Default)]
struct PartBuilder {
    part: Part,
    piece: BytesMut,
}

/// Which part of a payload a response carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Upserts,
    Removals,
    Both,
    Nothing,
}

/// One response to one subscriber.
#[derive(Debug, Clone)]
pub(super) struct Response {
    pub(super) type_url: Str,
    pub(super) nonce: String,
    pub(super) payload: Arc<Payload>,
    pub(super) content: Content,
}

impl Payload {
    /// Its size on the wire.
    pub(super) fn bytes(&self) -> usize {
        self.upserts.bytes + self.removals.bytes
    }
}

impl<'a> PayloadBuilder<'a> {
    pub(super) fn new(view: View<'a>, aliases: Aliases) -> Self {
        Self {
            view,
            aliases,
            upserts: PartBuilder::default(),
            removals: PartBuilder::default(),
        }
    }

    pub(super) fn upsert(&mut self, resource: &Resource) {
        let body = self.view.body(resource);
        let aliases = match self.aliases {
            Aliases::Send => &resource.aliases[..],
            Aliases::Omit => &[],
        };
        self.upserts
            .resource(self.view.type_url(), resource, aliases, body);
    }

    pub(super) fn remove(&mut self, name: &Str) {
        self.removals.removed(name);
    }

    pub(super) fn build(self, to: Sequence) -> Payload {
        Payload {
            to,
            upserts: self.upserts.build(),
            removals: self.removals.build(),
        }
    }
}

impl PartBuilder {
    /// `DeltaDiscoveryResponse.resources` (2): `Resource` with version 1, resource 2, name 3, aliases 4. The body comes
    /// last (field order is free), so that it can be a piece of its own.
    fn resource(&mut self, type_url: &str, resource: &Resource, aliases: &[Str], body: &[u8]) {
        let any = field_len(type_url.len()) + field_len(body.len());
        let names: usize = aliases.iter().map(|alias| field_len(alias.len())).sum();
        let whole = field_len(resource.version.len()) + field_len(resource.name.len()) + names;
        self.reserve(whole + any + 32);
        let piece = &mut self.piece;
        put_header(piece, 2, whole + field_len(any));
        put_text(piece, 1, &resource.version);
        put_text(piece, 3, &resource.name);
        aliases.iter().for_each(|alias| put_text(piece, 4, alias));
        put_header(piece, 2, any);
        put_text(piece, 1, type_url);
        put_header(piece, 2, body.len());
        if body.len() < LARGE_BODY {
            // Copied from where it is: a share of `Bytes` is counted in a place of its own, which stays.
            piece.extend_from_slice(body);
        } else {
            self.cut();
            self.push(resource.body.slice_ref(body));
        }
        self.part.names.push(resource.name.clone());
    }

    /// `DeltaDiscoveryResponse.removed_resources` (6).
    fn removed(&mut self, name: &Str) {
        self.reserve(field_len(name.len()));
        put_text(&mut self.piece, 6, name);
        self.part.names.push(name.clone());
    }

    fn reserve(&mut self, more: usize) {
        if self.piece.len() + more > PIECE {
            self.cut();
        }
    }

    fn cut(&mut self) {
        let piece = self.piece.split().freeze();
        self.push(piece);
    }

    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.part.bytes += piece.len();
            self.part.pieces.push(piece);
        }
    }

    fn build(mut self) -> Part {
        self.cut();
        self.part
    }
}

impl Response {
    /// The gRPC message (length prefix and protobuf) in pieces that are shared with every other subscriber, but for
    /// the first. `None` if it is larger than gRPC can say.
    pub(super) fn pieces(&self) -> Option<impl Iterator<Item = Bytes> + '_> {
        let parts: &[&Part] = match self.content {
            Content::Upserts => &[&self.payload.upserts],
            Content::Removals => &[&self.payload.removals],
            Content::Both => &[&self.payload.upserts, &self.payload.removals],
            Content::Nothing => &[],
        };
        let version = format!("{:x}", self.payload.to);
        let mut own = BytesMut::with_capacity(128);
        put_text(&mut own, 1, &version);
        put_text(&mut own, 4, &self.type_url);
        put_text(&mut own, 5, &self.nonce);
        let shared: usize = parts.iter().map(|part| part.bytes).sum();
        let length = u32::try_from(own.len() + shared).ok()?;
        let mut head = BytesMut::with_capacity(own.len() + 5);
        head.put_u8(0);
        head.put_u32(length);
        head.unsplit(own);
        let pieces: Vec<Bytes> = parts.iter().flat_map(|part| part.pieces.clone()).collect();
        Some(std::iter::once(head.freeze()).chain(pieces))
    }

    /// The names of its new and altered resources.
    pub(super) fn upserted(&self) -> &[Str] {
        match self.content {
            Content::Upserts | Content::Both => &self.payload.upserts.names,
            Content::Removals | Content::Nothing => &[],
        }
    }

    /// Its size on the wire, but for its own few bytes.
    pub(super) fn bytes(&self) -> usize {
        match self.content {
            Content::Upserts => self.payload.upserts.bytes,
            Content::Removals => self.payload.removals.bytes,
            Content::Both => self.payload.bytes(),
            Content::Nothing => 0,
        }
    }
}

/// Size of a length-delimited field with a number below 16.
fn field_len(length: usize) -> usize {
    1 + prost::length_delimiter_len(length) + length
}

fn put_header(piece: &mut BytesMut, field: u8, length: usize) {
    piece.put_u8(field << 3 | 2);
    prost::encode_length_delimiter(length, piece).expect("BytesMut grows");
}

fn put_text(piece: &mut BytesMut, field: u8, text: &str) {
    put_header(piece, field, text.len());
    piece.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use proto::xds::DeltaDiscoveryResponse;

    use super::*;

    fn resource(name: &str, body: usize) -> Resource {
        Resource {
            type_url: proto::ADDRESS_TYPE_URL,
            scope: None,
            name: name.into(),
            aliases: ["net/10.0.0.1".into()].into(),
            version: "00ff".into(),
            body: vec![7; body].into(),
            node: None,
            services: Box::default(),
        }
    }

    fn decoded(response: &Response) -> DeltaDiscoveryResponse {
        let message: Vec<u8> = response.pieces().unwrap().flatten().collect();
        let length = u32::from_be_bytes(message[1..5].try_into().unwrap());
        assert_eq!(message[0], 0, "not compressed");
        assert_eq!(usize::try_from(length).unwrap(), message.len() - 5);
        DeltaDiscoveryResponse::decode(&message[5..]).unwrap()
    }

    #[test]
    fn a_response_put_together_is_what_the_generated_type_reads() {
        let sizes = [0, 1, 300, LARGE_BODY - 1, LARGE_BODY, 3 * PIECE, 40, 20_000];
        for aliases in [Aliases::Send, Aliases::Omit] {
            let view = View::of(proto::ADDRESS_TYPE_URL, None);
            let mut builder = PayloadBuilder::new(view, aliases);
            for size in sizes {
                builder.upsert(&resource(&format!("uid-{size}"), size));
            }
            builder.remove(&"gone".into());
            let response = Response {
                type_url: proto::ADDRESS_TYPE_URL.into(),
                nonce: "n1".to_owned(),
                payload: Arc::new(builder.build(255)),
                content: Content::Both,
            };
            let read = decoded(&response);
            assert_eq!(read.type_url, proto::ADDRESS_TYPE_URL);
            assert_eq!((&*read.nonce, &*read.system_version_info), ("n1", "ff"));
            assert_eq!(read.removed_resources, ["gone"]);
            assert_eq!(read.resources.len(), sizes.len());
            for (got, size) in read.resources.iter().zip(sizes) {
                let any = got.resource.as_ref().unwrap();
                assert_eq!(got.name, format!("uid-{size}"));
                assert_eq!(got.version, "00ff");
                assert_eq!(got.aliases.is_empty(), aliases == Aliases::Omit);
                assert_eq!(any.type_url, proto::ADDRESS_TYPE_URL);
                assert_eq!(any.value.len(), size);
            }
        }
    }

    #[test]
    fn an_answer_with_nothing_is_still_a_message() {
        let builder = PayloadBuilder::new(View::of("x", None), Aliases::Omit);
        let response = Response {
            type_url: "x".into(),
            nonce: "1".to_owned(),
            payload: Arc::new(builder.build(0)),
            content: Content::Nothing,
        };
        assert_eq!(decoded(&response).nonce, "1");
    }
}
