// From a page of this address, so that the cookie goes along wherever the link was clicked, and the link leaves history.
location.replace("/");
