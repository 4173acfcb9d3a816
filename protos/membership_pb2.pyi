from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SigningRequest(_message.Message):
    __slots__ = ("request", "wait_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    wait_s: float
    def __init__(self, request: _Optional[bytes] = ..., wait_s: _Optional[float] = ...) -> None: ...

class SigningReply(_message.Message):
    __slots__ = ("certificate", "revocations")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    revocations: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., revocations: _Optional[bytes] = ...) -> None: ...

class RevocationsRequest(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class RevocationsReply(_message.Message):
    __slots__ = ("revocations",)
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    revocations: bytes
    def __init__(self, revocations: _Optional[bytes] = ...) -> None: ...

class UnsignedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Unsigned(_message.Message):
    __slots__ = ("caller", "key", "request")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    caller: str
    key: str
    request: bytes
    def __init__(self, caller: _Optional[str] = ..., key: _Optional[str] = ..., request: _Optional[bytes] = ...) -> None: ...

class UnsignedReply(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[Unsigned]
    def __init__(self, requests: _Optional[_Iterable[_Union[Unsigned, _Mapping]]] = ...) -> None: ...

class Signed(_message.Message):
    __slots__ = ("caller", "key", "certificate", "refusal")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    caller: str
    key: str
    certificate: bytes
    refusal: str
    def __init__(self, caller: _Optional[str] = ..., key: _Optional[str] = ..., certificate: _Optional[bytes] = ..., refusal: _Optional[str] = ...) -> None: ...

class SignRequest(_message.Message):
    __slots__ = ("answers", "revocations")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    REVOCATIONS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[Signed]
    revocations: bytes
    def __init__(self, answers: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., revocations: _Optional[bytes] = ...) -> None: ...

class SignReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
